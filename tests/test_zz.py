def test_limits():
    import resource, ctypes, signal
    print({k: resource.getrlimit(getattr(resource,k)) for k in dir(resource) if k.startswith('RLIMIT')})
    print({s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGXFSZ, signal.SIGSEGV)})
