"""Models the paper compares with, one file each; a module here registers itself in the zoo when it is imported."""
