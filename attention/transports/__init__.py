"""How pages travel between two memories. One interface (`base`), one description of what travels (`move`), one module a transport."""
