"""Builds the embedded emoji world (data/emoji) from the Noto colour emoji font; see
data/build_emoji.py."""
