"""Pixels to features: image and video processing, the vision tower, positions, fusion. Import from
the modules.
"""
