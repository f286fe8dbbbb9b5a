# Lets a key log in as root over SSH, and says what the host has to know of the guest's sshd. Its input is the key, as a line of
# authorized_keys. Status 3: there is no sshd; 4: it does not start; 5: it asks no file for keys.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
sshd=$(command -v sshd) || exit 3
# A service makes it, with which an sshd that was never started would not even say its settings.
mkdir -p /run/sshd
settings=$("$sshd" -T -C user=root,host=localhost,addr=127.0.0.1) || exit 4
printf '%s\n' "$settings" | grep -E '^(port|permitrootlogin|pubkeyauthentication) '

set -- $(printf '%s\n' "$settings" | sed -n 's/^authorizedkeysfile //p')
file=$(printf '%s\n' "$1" | sed "s|%h|$(echo ~root)|g; s|%u|root|g")
case $file in
none | '') exit 5 ;;
/*) ;;
*) file=~root/$file ;;
esac
read -r type key comment
umask 077
mkdir -p "${file%/*}"
# cloud-init may have put the same key there with a command that turns root away, and the first line with a key counts.
others=$(grep -vF "$key" "$file" 2>/dev/null)
printf '%s\n' "$type $key $comment" "$others" >"$file" || exit
# Where SELinux is on, sshd reads no file that has not its label.
if command -v restorecon >/dev/null; then restorecon -R "${file%/*}"; fi

printf '%s\n' "$settings" | sed -n 's/^hostkey //p' | while read -r file; do
    [ -r "$file.pub" ] && sed 's/^/public /' "$file.pub"
done
awk '$4 == "0A" { split($2, part, ":"); print "listens " part[length(part)] }' /proc/net/tcp /proc/net/tcp6 2>/dev/null
:
