"""What the scripts share; the method itself knows nothing of it.

Rooms, each on top of the one before: records, tasks, studies; and speed.
"""
