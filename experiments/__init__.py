"""Programs that compare weightings on problems of all kinds; run from a clone of the repository."""
