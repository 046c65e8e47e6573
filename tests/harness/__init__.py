"""What the tests drive: hostd and guestd as processes, the wire as bytes, and the room for microVMs."""
