"""What comes in: readers give tables of rows, tasks' rows are found in them, split, inspected, and put into batches.

A row knows the line it stands on, from the file to the last message about it.
"""
