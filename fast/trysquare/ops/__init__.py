"""The updates as tensor functions, named as in the reference.

A batch is a tensor of shape (B, R, C): B parameters of one shape, R rows (the leading index), C everything else
flattened; one-dimensional parameters are batches of shape (B, 1, N). Functions whose name ends in an underscore work
in place. They are what runs eagerly and what ``torch.compile`` compiles; none of them knows an optimizer.
"""
