"""The same rules on a GPU: loops, prologue and the compiler that turns them into PTX without one."""
