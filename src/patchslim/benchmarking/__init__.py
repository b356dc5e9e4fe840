"""Times files on their runtimes: one process a file, in rounds that take turns.

`benchmark` is the verb. `child` runs in each process, and `worker` is the other end of its pipe.
`result` holds what was measured. Nothing here knows methods or hosts.
"""
