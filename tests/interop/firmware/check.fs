\ SLOF reads a file, adds it up, and writes 16 KiB of it beside the partition.
\ Nothing is closed: that takes bus mastering away, whereupon QEMU forgets
\ DRIVER_OK, which SLOF does not set again.
hex
s" disk:1,\other" open-dev value file
load-base 100000 + value at
at s" load" file $call-method value bytes
: sum 0 bytes 4 / 0 do at i 4 * + l@ + loop ffffffff and ;
cr ." guest sum " sum .
s" disk" open-dev value disk
c8000 0 s" seek" disk $call-method drop
at 4000 s" write" disk $call-method
cr ." guest written " . cr
power-off
