"""Measures of what a model makes: reconstruction, FVD, VBench and the shapes benchmark."""
