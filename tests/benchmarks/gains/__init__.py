"""Speed that nobody writes by hand: each gain that the docs claim, beside what it replaces."""
