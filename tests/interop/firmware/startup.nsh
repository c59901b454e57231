@echo -off
fs0:
mkdir dir
cp file dir\copy
cp other dir\new
comp file dir\copy
echo guest comp %lasterror%
rm -q gone
reset -s
