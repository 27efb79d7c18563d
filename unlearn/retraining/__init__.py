"""Models trained again without some images, and what they are asked."""
