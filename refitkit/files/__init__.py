"""Files and folders of refitkit: archives, replacement, temporary folders, and signs of change."""
