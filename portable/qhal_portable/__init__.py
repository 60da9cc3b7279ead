"""Every operation of the contract in plain PyTorch, on any device that torch has and that knows float64.

On a processor this is the reference: it defines the numbers. Under another device's backend it is the floor: each
request that has no kernel of its own yet is executed here, exactly, and `Support.executes` says so. A backend
subclasses `ops.PortableOps` and overrides, operation by operation, what it has something better for.
"""
