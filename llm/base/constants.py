"""Values that several rooms share."""

IGNORED = -100  # a target that does not count
