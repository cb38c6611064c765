"""Paging structures of both dimensions: the manual's bits (`spec`) and builders of tables (`tables`)."""
