"""Images and videos: their files, checked, and their pixels, decoded in processes that can be
ended.
"""
