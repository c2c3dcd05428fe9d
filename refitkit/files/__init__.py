"""Read and write files safely: archives, formats, replacement, temporary folders, file states."""
