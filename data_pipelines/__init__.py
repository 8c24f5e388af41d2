"""Raw video -> streaming shards -> decoded clips; pre-encoding to bit codes; training batches."""
