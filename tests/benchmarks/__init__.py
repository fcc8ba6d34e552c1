"""How fast lightkit is, beside a loop written by hand and beside other trainers: see README.md."""
