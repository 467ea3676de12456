// A ROWS x COLUMNS weight-stationary array: weights shift in from the top, activations move right, sums move
// down. The test bench multiplies a random (M x K) by a random (K x N) matrix fold by fold, compares every
// output with the sum of products, and prints how many cycles all folds took and how many outputs were wrong.

module mac_cell (
    input clk,
    input load,
    input signed [7:0] weight_in,
    input signed [7:0] act_in,
    input signed [31:0] sum_in,
    output reg signed [7:0] weight,
    output reg signed [7:0] act,
    output reg signed [31:0] sum
);
    always @(posedge clk) begin
        if (load) weight <= weight_in;
        act <= act_in;
        sum <= sum_in + weight * act_in;
    end
endmodule

module array #(parameter ROWS = 4, COLUMNS = 4) (
    input clk,
    input load,
    input [8*COLUMNS-1:0] weights,
    input [8*ROWS-1:0] acts,
    output [32*COLUMNS-1:0] sums
);
    wire [7:0] weight [0:ROWS][0:COLUMNS-1];
    wire [7:0] act [0:ROWS-1][0:COLUMNS];
    wire [31:0] sum [0:ROWS][0:COLUMNS-1];
    genvar r, c;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : top
            assign weight[0][c] = weights[8*c +: 8];
            assign sum[0][c] = 0;
            assign sums[32*c +: 32] = sum[ROWS][c];
        end
        for (r = 0; r < ROWS; r = r + 1) begin : row
            assign act[r][0] = acts[8*r +: 8];
            for (c = 0; c < COLUMNS; c = c + 1) begin : column
                mac_cell one (clk, load, weight[r][c], act[r][c], sum[r][c],
                              weight[r+1][c], act[r][c+1], sum[r+1][c]);
            end
        end
    endgenerate
endmodule

module bench;
    parameter ROWS = 4, COLUMNS = 4, M = 5, K = 6, N = 7;
    reg clk = 0, load = 0;
    reg [8*COLUMNS-1:0] weights = 0;
    reg [8*ROWS-1:0] acts = 0;
    wire [32*COLUMNS-1:0] sums;
    array #(ROWS, COLUMNS) dut (clk, load, weights, acts, sums);

    reg signed [7:0] a [0:M*K-1];
    reg signed [7:0] b [0:K*N-1];
    reg signed [31:0] out [0:M*N-1];
    integer i, j, l, r, c, step, top, left, expected;
    integer cycles = 0, wrong = 0, seed = 1;

    task tick;
        begin
            #1 clk = 1;
            #1 clk = 0;
            cycles = cycles + 1;
        end
    endtask

    initial begin
        for (i = 0; i < M*K; i = i + 1) a[i] = $random(seed);
        for (i = 0; i < K*N; i = i + 1) b[i] = $random(seed);
        for (i = 0; i < M*N; i = i + 1) out[i] = 0;
        for (left = 0; left < N; left = left + COLUMNS)
            for (top = 0; top < K; top = top + ROWS) begin
                load = 1;
                acts = 0;
                for (r = ROWS - 1; r >= 0; r = r - 1) begin
                    for (c = 0; c < COLUMNS; c = c + 1)
                        weights[8*c +: 8] = (top + r < K && left + c < N) ? b[(top + r)*N + left + c] : 8'd0;
                    tick;
                end
                load = 0;
                for (step = 0; step < M + ROWS + COLUMNS - 2; step = step + 1) begin
                    for (r = 0; r < ROWS; r = r + 1)
                        acts[8*r +: 8] = (step >= r && step - r < M && top + r < K) ? a[(step - r)*K + top + r] : 8'd0;
                    tick;
                    for (c = 0; c < COLUMNS; c = c + 1) begin
                        i = step - (ROWS - 1) - c;
                        if (i >= 0 && i < M && left + c < N)
                            out[i*N + left + c] = out[i*N + left + c] + $signed(sums[32*c +: 32]);
                    end
                end
            end
        for (i = 0; i < M; i = i + 1)
            for (j = 0; j < N; j = j + 1) begin
                expected = 0;
                for (l = 0; l < K; l = l + 1) expected = expected + a[i*K + l] * b[l*N + j];
                if (out[i*N + j] !== expected) wrong = wrong + 1;
            end
        $display("%0d %0d", cycles, wrong);
        $finish;
    end
endmodule
