"""Who owns and who holds which box, predicted for any topology before a single rank has started."""
