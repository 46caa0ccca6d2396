"""A base model and what another adds to it: two rules, the report, and what the new pieces are made of."""
