"""Values that several rooms share."""

IGNORED = -100  # target value of positions without a loss
