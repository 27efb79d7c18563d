"""Task files, a data root's settings and captions, training sets, and pictures and prompts
encoded."""
