"""The logical CPU: operations, privilege, the execution loop, translation and memory caches."""
