# Typed into any sh on a guest's virtio console: a loop that runs commands for the host, any number at a time.
# Commands run in the background, so that the loop can always be told of others; each in a cgroup of its own
# (cgroup v2 with cgroup.kill, Linux 5.14), else in a session of its own. The files of one are called by its token.
# Of an interactive shell with job control a job that sets its terminal is stopped for that.
set +m
chvm_tmp=$(mktemp -d /run/chvm.XXXXXX 2>/dev/null || mktemp -d)
chvm_cgroup=/sys/fs/cgroup/chvm chvm_number=0 chvm_running= chvm_shell=
chvm_line_end='
'
# The next command's is always there: making it takes milliseconds of an emulated guest.
mkdir -p $chvm_cgroup/1 2>/dev/null
[ -w $chvm_cgroup/cgroup.kill ] || chvm_cgroup=
# A command may have removed it.
chvm_directory() { [ -d $chvm_tmp ] || mkdir -p -m 700 $chvm_tmp; }
# Who has read the line that is in this pipe has the turn to write to the console, until there is one again.
chvm_open_turn() {
    chvm_directory
    rm -f $chvm_tmp/turn
    mkfifo $chvm_tmp/turn
    exec 9<>$chvm_tmp/turn
    echo >&9
}
chvm_open_turn
# The loop itself never waits for the turn: it hears of what gives it back.
chvm_say() { chvm_tell "$@" & }
chvm_tell() {
    read -r turn <&9
    printf '\n%s %s\n' $1 "$2"
    echo >&9
}
# An output goes in pieces, each once the host has the one before: a VMM keeps or drops what its console's reader is slow to
# take. The host has said how much chvm_piece is.
chvm_send() {
    left=$4 block=0
    # A command may have changed the terminal's settings: with them set wrong a write becomes many. A short one comes through.
    [ $left -gt 512 ] && stty raw -echo 2>/dev/null <&1
    while [ $left -gt 0 ]; do
        read -r turn <&9
        printf '\n%s %s %d\n' $1 $2 $left
        # What goes on writing to the file has no part in the answer. With one write each: of many small ones the VMM drops some.
        if [ $block = 0 ]; then
            dd if=$3 bs=$((left < chvm_piece ? left : chvm_piece)) count=1
        elif [ $left -ge $chvm_piece ]; then
            dd if=$3 bs=$chvm_piece skip=$block count=1
        else
            dd if=$3 bs=$chvm_piece skip=$block count=1 | head -c $left | cat
        fi 2>/dev/null
        left=$((left - chvm_piece)) block=$((block + 1))
    done
}
# chvm_launch TOKEN SCRIPT: starts the process $command by the words in $shell, with 7 and 8 as its outputs.
chvm_launch() {
    files=$chvm_tmp/$1 group= input=/dev/null
    if [ "$chvm_cgroup" ]; then
        group=$chvm_cgroup/$chvm_number
        [ -d $group ] || mkdir $group 2>/dev/null || [ -d $group ] || group=
    fi
    [ -e $files.input ] && input=$files.input
    [ -e $files.script ] && set -- $1 ". $files.script"
    (
        [ "$group" ] && echo 0 >$group/cgroup.procs
        # It was to be killed before there was anything to kill.
        [ -e $files.kill ] && exit 137
        unset chvm_tmp chvm_cgroup chvm_number chvm_running chvm_piece chvm_token
        exec setsid $shell -c "$2" 5<&- 6<&- 7>&- 8>&- 9>&-
    ) <$input >&7 2>&8 &
    command=$!
    echo $command >$files.pid
}
# chvm_supervise TOKEN SCRIPT, with the outputs' files at 7 and 8, which stay when their names are removed.
chvm_supervise() {
    shell=sh
    chvm_launch "$@"
    wait $command
    status=$?
    # Of both at once, since each process takes milliseconds of an emulated guest: size, name, size, name, and their sum.
    if [ -s /proc/self/fd/7 ] || [ -s /proc/self/fd/8 ]; then
        set -- $1 $(wc -c /proc/self/fd/7 /proc/self/fd/8)
        chvm_send $1 out $3 $2
        chvm_send $1 err $5 $4
    fi
    chvm_end $1
    chvm_tidy
}
chvm_end() {
    # Not with ":", whose redirection ends a shell when the directory is gone.
    true >$files.pid
    chvm_tell $1 "end $status"
}
chvm_tidy() {
    rm -f $files.*
    if [ "$group" ]; then
        rmdir $group
        read -r latest <$chvm_tmp/number
        [ "$latest" = $chvm_number ] && mkdir $chvm_cgroup/$((chvm_number + 1))
    fi 2>/dev/null
}
# chvm_attend TOKEN SCRIPT: a process whose outputs are sent as they come, and whose end is told when it comes.
chvm_attend() {
    fifos=$chvm_tmp/$1
    mkfifo $fifos.out $fifos.err $fifos.out.go $fifos.err.go || {
        for word in begun "out 0" "err 0" "end 126"; do chvm_tell $1 "$word"; done
        rm -f $fifos.*
        return
    }
    # Opened for both first, so that no end waits for the other.
    exec 4<>$fifos.out 5<$fifos.out 7>$fifos.out 4<>$fifos.err 6<$fifos.err 8>$fifos.err 4>&-
    shell=$chvm_shell
    chvm_launch "$@"
    chvm_tell $1 begun
    # As subshells: BusyBox keeps what a function's redirections replace open, and the pipes would never end.
    (chvm_stream $1 out) <&5 5<&- 6<&- 7>&- 8>&- &
    senders=$!
    (chvm_stream $1 err) <&6 5<&- 6<&- 7>&- 8>&- &
    senders="$senders $!"
    exec 5<&- 6<&- 7>&- 8>&-
    echo $senders >$files.senders
    wait $command
    status=$?
    chvm_end $1
    wait $senders
    chvm_tidy
}
# chvm_stream TOKEN NAME: sends what comes at 0, each piece once the host has asked for it; an empty one is the last.
chvm_stream() {
    exec 7<>$chvm_tmp/$1.$2.go
    # Smaller pieces than a command's, which waits for its turn meanwhile.
    [ $chvm_piece -gt 8192 ] && chvm_piece=8192
    # Does the same without a process for each step; what is before a piece's size, and the largest piece.
    [ -x /lib/chvm/stream ] && exec /lib/chvm/stream "$chvm_line_end$1 $2 " $chvm_piece
    part=$chvm_tmp/$1.$2.part
    while :; do
        dd bs=$chvm_piece count=1 of=$part 2>/dev/null
        set -- $1 $2 $(wc -c $part || echo 0)
        [ $3 -gt 512 ] && stty raw -echo 2>/dev/null <&1
        read -r turn <&9
        printf '\n%s %s %d\n' $1 $2 $3
        [ $3 = 0 ] && break
        dd if=$part bs=$chvm_piece 2>/dev/null
        read -r go <&7
    done
    echo >&9
}
# A shell's background processes ignore SIGINT and SIGQUIT, and so does all that they start; a process of a test's is not to.
chvm_find_shell() {
    for chvm_shell in "/lib/chvm/signals /bin/sh" "env --default-signal=INT,QUIT /bin/sh" /bin/sh; do
        $chvm_shell -c : 2>/dev/null && break
    done
}
# chvm_start TOKEN SCRIPT: with the outputs in files; with a third argument, as they come.
chvm_start() {
    chvm_number=$((chvm_number + 1))
    chvm_directory
    echo $chvm_number >$chvm_tmp/number
    # Not empty while there is something to kill.
    echo - >$chvm_tmp/$1.pid
    if [ "$3" ]; then
        chvm_attend $1 "$2" &
    else
        chvm_supervise $1 "$2" 7>$chvm_tmp/$1.out 8>$chvm_tmp/$1.err &
    fi
    chvm_known=
    for chvm_entry in $chvm_running; do
        chvm_read $chvm_entry
        [ -e $chvm_tmp/$chvm_of.pid ] || [ -d $chvm_cgroup/$chvm_group ] && chvm_known="$chvm_known $chvm_entry"
    done
    chvm_running="$chvm_known $1:$chvm_number:$!"
}
# Splits TOKEN:NUMBER:SUPERVISOR
chvm_read() { chvm_of=${1%%:*} chvm_job=${1##*:} chvm_group=${1#*:} && chvm_group=${chvm_group%:*}; }
chvm_kill() {
    true >$chvm_tmp/$chvm_of.kill
    if [ "$chvm_cgroup" ] && [ -d $chvm_cgroup/$chvm_group ]; then
        echo 1 >$chvm_cgroup/$chvm_group/cgroup.kill
    else
        read -r chvm_pid <$chvm_tmp/$chvm_of.pid && { kill -KILL -$chvm_pid || kill -KILL $chvm_pid; }
    fi
} 2>/dev/null
# Reads a line of the host's, and nothing behind it: what follows may be another program's.
if [ "$BASH_VERSION" ]; then
    # Its `read` takes from a terminal all that is there, and hands it out to later ones, also of files; `mapfile` does not.
    chvm_next() {
        mapfile -t -n 1 chvm_line
        chvm_op=${chvm_line%% *} chvm_rest=${chvm_line#* }
        chvm_token=${chvm_rest%% *} chvm_rest=${chvm_rest#* }
        # There is none at the end.
        [ "${chvm_line+is set}" ]
    }
else
    chvm_next() { IFS=' ' read -r chvm_op chvm_token chvm_rest; }
fi
chvm_loop() {
    chvm_say $1 loop
    while chvm_next; do
        case $chvm_op in
        run | open)
            case $chvm_rest in
            *\\*) chvm_command=$(printf '%b.' "$chvm_rest") && chvm_rest=${chvm_command%.} ;;
            esac
            [ $chvm_op = run ] || [ "$chvm_shell" ] || chvm_find_shell
            chvm_start $chvm_token "$chvm_rest" ${chvm_op#run}
            ;;
        go) [ -p $chvm_tmp/$chvm_token.$chvm_rest.go ] && echo 1<>$chvm_tmp/$chvm_token.$chvm_rest.go ;;
        # To all that it started and that is in its process group, as a terminal's Ctrl-C.
        signal)
            read -r chvm_pid <$chvm_tmp/$chvm_token.pid && {
                kill -$chvm_rest -$chvm_pid || kill -$chvm_rest $chvm_pid
            }
            ;;
        text)
            chvm_directory
            printf '%b' "$chvm_rest" >$chvm_tmp/$chvm_token.input
            ;;
        input | script)
            chvm_directory
            head -c $chvm_rest >>$chvm_tmp/$chvm_token.$chvm_op
            # It is the host's turn.
            printf '\n%s input\n' $chvm_token
            echo >&9
            ;;
        turn)
            {
                read -r turn <&9
                printf '\n%s turn\n' $chvm_token
            } &
            ;;
        more) echo >&9 ;;
        do) eval "$chvm_rest" </dev/null >/dev/null 2>&1 ;;
        kill)
            for chvm_entry in $chvm_running; do
                chvm_read $chvm_entry
                [ $chvm_of = $chvm_token ] && chvm_kill
            done
            # Of one that was never started.
            [ -e $chvm_tmp/$chvm_token.pid ] || rm -f $chvm_tmp/$chvm_token.*
            ;;
        drop)
            # The host has given up all commands, their answers too. What one that has ended left running goes on.
            for chvm_entry in $chvm_running; do
                chvm_read $chvm_entry
                [ -e $chvm_tmp/$chvm_of.pid ] || continue
                [ -s $chvm_tmp/$chvm_of.pid ] && chvm_kill
                [ -e $chvm_tmp/$chvm_of.senders ] && read -r chvm_senders <$chvm_tmp/$chvm_of.senders && kill -KILL $chvm_senders
                kill -KILL $chvm_job 2>/dev/null && wait $chvm_job 2>/dev/null
                rm -f $chvm_tmp/$chvm_of.*
            done
            chvm_running=
            chvm_open_turn
            ;;
        # What the host says when it connects: a command may have changed the terminal's settings.
        stty) stty raw -echo 2>/dev/null ;;
        eval) chvm_say $chvm_token loop ;;
        esac
    done
# A shell says of its jobs that they were killed, in the middle of somebody's output.
} 2>/dev/null
