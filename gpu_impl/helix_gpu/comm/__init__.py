"""Communication: the ranks as a mesh, and how partials travel between them.

- `agreement`: what ranks tell each other before they go on;
- `mesh`: the ranks as TP x CP for attention, and as EP x TP for the FFN;
- `exchange`: the exchange of partials by collectives;
- `push`: the same by writing into the peers' memory, without collectives;
- `windows`: the layout of the memory into which peers write;
- `push_kernels`: the Triton kernels that write and read it;
- `hop_b`: attention and exchange of two half batches at a time.

Nothing is imported here.
"""
