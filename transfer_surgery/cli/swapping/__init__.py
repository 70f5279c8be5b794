"""`transfer-surgery swap`, and the folders of images that it reads."""
