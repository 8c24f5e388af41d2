"""What the project's parts cost, each as a script that prints one JSON object as its last line."""
