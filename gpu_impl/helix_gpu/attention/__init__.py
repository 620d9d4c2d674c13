"""Attention of new tokens over this rank's pages, and the merge of what the ranks computed."""
