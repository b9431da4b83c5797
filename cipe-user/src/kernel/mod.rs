//! What we ask of the kernel: eBPF objects and maps, links and addresses, routes and neighbours.
