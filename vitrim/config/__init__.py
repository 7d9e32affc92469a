"""What the user asked for: the recipe and its parts."""
