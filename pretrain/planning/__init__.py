"""`videoar plan`: parameters, memory, FLOPs, time, layout and storage of a run, before anyone books a GPU. No data need be there."""
