"""The bill before it is paid: FLOPs, memory, hours and dollars of a recipe, and the recipe that a sum of money buys."""
