"""What holds between the attempts of a run: who runs it, who may write, what happened, what to do next. No torch."""
