"""The planner beside runs that others measured and published."""
