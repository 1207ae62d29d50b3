"""The experiments of a checkout: what each holds, how one runs, what they share."""
