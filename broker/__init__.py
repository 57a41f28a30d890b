"""Who does what, when: the pure decision core, and the daemon that performs what it decides."""
