"""Card templates, and the `evaluate` metrics as they are published on the Hub."""
