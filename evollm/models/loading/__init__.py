"""Loading a base: by name, from a folder of an adapter, or from a policy archive, with its type and device."""
