"""Programs that compare weightings on the shipped problems; run from a clone of the repository."""
