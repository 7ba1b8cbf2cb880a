"""What cachd asks of the operating system: durable files, leases, inotify, pages in memory, threads."""
