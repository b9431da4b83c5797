//! AF_XDP: UMEM, rings and sockets. All AF_XDP unsafe lives here.
