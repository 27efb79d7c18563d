"""Other ways to rank training images, which the method is compared with."""
