"""How many tokens each block leaves, from budgets and operation counts."""
