"""What may differ between the run that saved and the run that resumes, and the verdict on two runs. No torch."""
