"""Questions: webdataset shards, media, the resumable stream. Import from the modules."""
