"""What is measured. Each module: ``tables(plan)``, and a docstring whose first line says what."""
