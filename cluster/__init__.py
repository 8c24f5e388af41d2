"""Starting commands, here or on a cluster. This room imports no model code."""
